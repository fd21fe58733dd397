"""What every other package may use: errors, options, files and memory. It knows no model and no adapter."""
