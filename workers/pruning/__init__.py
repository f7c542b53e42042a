"""The mathematics of pruning: which slices are encoded, which tokens the language model sees.

Tensors in, tensors out; imports torch and nothing else. Knows nothing of DICOM, hosts or settings.
"""
