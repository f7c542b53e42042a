"""The GPU side: reads a study with a vision-language model. Never speaks DICOM over a network."""
