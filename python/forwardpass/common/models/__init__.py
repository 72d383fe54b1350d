"""What is asked of models and done to them: their modules, patterns of names, comparisons, generation."""
