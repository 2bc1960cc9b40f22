"""What a run would cost and what would spoil it, before anything is loaded."""
