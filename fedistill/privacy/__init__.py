"""What a site may promise about its data, how the promise is kept, and how it is attacked."""
