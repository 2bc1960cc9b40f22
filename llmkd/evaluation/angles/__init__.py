"""How far apart the directions are in which a student block would move towards different teacher blocks, before and after training."""
