"""Running at scale: launching, generating, watching."""
