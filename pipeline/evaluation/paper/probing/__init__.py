"""What labels can be learned from D's features: the linear SVM of section 5 of the paper, and its control."""
