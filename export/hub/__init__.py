"""A folder for the Hugging Face Hub: a model, its card, and what shows them."""
