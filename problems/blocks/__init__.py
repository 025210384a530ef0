"""What the papers share: data, networks, augmentation and measures. Each file holds one of them; import it by name."""
