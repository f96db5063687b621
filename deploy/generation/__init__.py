"""What `dcgan-generate` runs: which images, how they are made, what is finished."""
