"""Train what surgery left: recipes, data, distillation, and the loop that runs them."""
