"""Where transformers calls us, and what is read from its code: attention, caches, rotary embedding, norms, padding."""
