"""The nearest images of others: by pixels, and by the features of an extractor."""
