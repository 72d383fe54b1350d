"""What is printed and drawn: results, tables, plots, and how often a thing is said."""
