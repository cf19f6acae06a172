"""What more than one of the scripts and notebooks needs; each module is one noun."""
