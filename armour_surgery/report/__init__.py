"""What is written for people to look at: pages, figures, and the words they share."""
