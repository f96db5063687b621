"""The networks, their latents and losses, the average of the weights."""
