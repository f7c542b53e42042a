"""AnalysisOutput and source headers -> DICOM result objects. Pure: time and identity come in as arguments."""
