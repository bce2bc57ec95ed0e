"""How the libraries themselves find converted models: after `import armour_surgery`, by their own names and calls."""
