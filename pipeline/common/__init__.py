"""What every room uses: errors, files, progress, randomness, images, metrics."""
