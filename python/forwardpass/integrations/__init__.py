"""Where other libraries call us: transformers, and everything that calls torch's scaled_dot_product_attention."""
