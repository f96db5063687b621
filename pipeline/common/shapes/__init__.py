"""The size of images, and how a picture becomes an image of that size."""
