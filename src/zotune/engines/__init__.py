"""Who computes the model, where it is not torch: files and programs of inference engines."""
