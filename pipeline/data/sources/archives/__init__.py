"""Archives of pictures, read as if they were folders."""
