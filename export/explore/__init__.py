"""`dcgan-export explore`: a page in the browser to look at what a model has learned."""
