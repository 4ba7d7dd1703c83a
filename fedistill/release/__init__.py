"""A synthetic set as a folder that the next person can use, and check, without its makers."""
