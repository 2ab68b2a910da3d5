"""Networks that write: their parts, the loop around them, and what calibrates them."""
