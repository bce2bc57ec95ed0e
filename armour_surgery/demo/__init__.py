"""What `armour-surgery demo` works on: a small trained Vision Transformer, and how it was trained."""
