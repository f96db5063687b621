"""Sources that are tables with a column of pictures: parquet and arrow files, as Hugging Face keeps data sets."""
