"""`dcgan-data index`: tars of others become a data set where they lie."""
