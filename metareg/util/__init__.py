"""What any part of metareg may use and what knows nothing of metareg: files, seeds, signals, memory layouts."""
