"""Pictures, LVIS annotations and the miniature made of them. Import the submodule you need; this file loads none."""
