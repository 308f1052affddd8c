"""Claims of papers, one typed Python file each: `card()` returns the card, `comparison()` a comparison behind it."""
