"""Where the teacher lives: each placement gives the same signals for the same batch."""
