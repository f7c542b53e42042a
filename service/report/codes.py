"""Every coded concept of our results: standard ones by their published codes, ours under 99MEDPRUNER.

The conformance statement lists this file. A private code never changes its meaning; a retired one is never reused.
"""

from __future__ import annotations

from pydicom.sr.coding import Code

from service.shared.messages import FindingName, Flag
from service.shared.settings import Companion

SCHEME = "99MEDPRUNER"
SCHEME_NAME = "medpruner-pacs private codes"


def _private(value: str, meaning: str) -> Code:
    return Code(value, SCHEME, meaning)


# Titles and containers
IMAGING_MEASUREMENT_REPORT = Code("126000", "DCM", "Imaging Measurement Report")
IMAGE_LIBRARY = Code("111028", "DCM", "Image Library")
IMAGE_LIBRARY_GROUP = Code("126200", "DCM", "Image Library Group")
IMAGING_MEASUREMENTS = Code("126010", "DCM", "Imaging Measurements")
MEASUREMENT_GROUP = Code("125007", "DCM", "Measurement Group")
QUALITATIVE_EVALUATIONS = Code("C0034375", "UMLS", "Qualitative Evaluations")

# TID 2000, where a PACS shows nothing else
DIAGNOSTIC_IMAGING_REPORT = Code("18748-4", "LN", "Diagnostic Imaging Report")
PROCEDURE_DESCRIPTIONS = Code("55111-9", "LN", "Current Procedure Descriptions")
FINDINGS = Code("59776-5", "LN", "Procedure Findings")
IMPRESSIONS = Code("19005-8", "LN", "Impressions")
PROCEDURE_DESCRIPTION = Code("121065", "DCM", "Procedure Description")

# TID 2010
FOR_RESEARCH = Code("113009", "DCM", "For Research")
KEY_OBJECT_DESCRIPTION = Code("113012", "DCM", "Key Object Description")

# Context
LANGUAGE = Code("121049", "DCM", "Language of Content Item and Descendants")
ENGLISH = Code("en", "RFC5646", "English")
OBSERVER_TYPE = Code("121005", "DCM", "Observer Type")
DEVICE = Code("121007", "DCM", "Device")
DEVICE_OBSERVER_UID = Code("121012", "DCM", "Device Observer UID")
PROCEDURE_REPORTED = Code("121058", "DCM", "Procedure Reported")
MODALITY = Code("121139", "DCM", "Modality")
FRAME_OF_REFERENCE_UID = Code("112227", "DCM", "Frame of Reference UID")
SOURCE = Code("260753009", "SCT", "Source")
SOURCE_OF_MEASUREMENT = Code("121112", "DCM", "Source of Measurement")
TRACKING_IDENTIFIER = Code("112039", "DCM", "Tracking Identifier")
TRACKING_UNIQUE_IDENTIFIER = Code("112040", "DCM", "Tracking Unique Identifier")
ALGORITHM_NAME = Code("111001", "DCM", "Algorithm Name")
ALGORITHM_VERSION = Code("111003", "DCM", "Algorithm Version")
ALGORITHM_PARAMETERS = Code("111002", "DCM", "Algorithm Parameters")
ARTIFICIAL_INTELLIGENCE = Code("123110", "DCM", "Artificial Intelligence")
ACQUISITION_EQUIPMENT = Code("109101", "DCM", "Acquisition Equipment")
SOURCE_IMAGE = Code("121322", "DCM", "Source image for image processing operation")
PROCESSING_EQUIPMENT = Code("109102", "DCM", "Processing Equipment")

# Text
FINDING = Code("121071", "DCM", "Finding")
IMPRESSION = Code("121073", "DCM", "Impression")
COMMENT = Code("121106", "DCM", "Comment")

YES = Code("373066001", "SCT", "Yes")
NO = Code("373067005", "SCT", "No")

# CID 100; its most general member for a modality without one of its own
PROCEDURES: dict[str, Code] = {
    "CT": Code("25045-6", "LN", "CT unspecified body region"),
    "MR": Code("25056-3", "LN", "MRI unspecified body region"),
    "PT": Code("44136-0", "LN", "PET unspecified body region"),
    "NM": Code("49118-3", "LN", "NM unspecified body region"),
}
IMAGING_PROCEDURE = Code("363679005", "SCT", "Imaging procedure")

# CID 29, as Modality inside the image library
MODALITIES: dict[str, Code] = {
    "CT": Code("CT", "DCM", "Computed Tomography"),
    "MR": Code("MR", "DCM", "Magnetic Resonance"),
    "PT": Code("PT", "DCM", "Positron emission tomography"),
    "NM": Code("NM", "DCM", "Nuclear Medicine"),
}

# The funnel from the series to the language model: concept and unit of each of Counts
NO_UNITS = Code("1", "UCUM", "no units")
_SLICES = Code("{slices}", "UCUM", "slices")
_IMAGES = Code("{images}", "UCUM", "images")
_TOKENS = Code("{tokens}", "UCUM", "tokens")
COUNTS: dict[str, tuple[Code, Code]] = {
    "slices_in_series": (_private("MP-001", "Slices in series"), _SLICES),
    "slices_readable": (_private("MP-002", "Slices readable"), _SLICES),
    "slices_sampled": (_private("MP-003", "Slices in some model input"), _SLICES),
    "inputs": (_private("MP-004", "Model inputs before pruning"), _IMAGES),
    "inputs_kept": (_private("MP-005", "Model inputs encoded"), _IMAGES),
    "tokens_in": (_private("MP-006", "Visual tokens before pruning"), _TOKENS),
    "tokens_kept": (_private("MP-007", "Visual tokens kept"), _TOKENS),
    "tokens_merged": (_private("MP-008", "Visual tokens merged"), _TOKENS),
    "tokens_text": (_private("MP-009", "Text tokens of the prompt"), _TOKENS),
    "tokens_generated": (_private("MP-011", "Tokens generated"), _TOKENS),
}
MODEL_INPUT_SELECTION = _private("MP-010", "Model input selection")
TOKEN_FRACTION = _private("MP-012", "Fraction of visual tokens kept")
SERIES_NOT_READ = (_private("MP-014", "Series of the study not read"), Code("{series}", "UCUM", "series"))
SLICES_SHOWN = (_private("MP-013", "Slices shown to the model"), _SLICES)

# Settings of both stages: numbers with their unit, switches, and choices with their values
MILLIMETRES = Code("mm", "UCUM", "millimeter")
PRUNING_NUMBERS: dict[str, tuple[Code, Code]] = {
    "gamma": (_private("MP-030", "Slice stage threshold gamma"), NO_UNITS),
    "tau": (_private("MP-031", "Token stage attention mass tau"), NO_UNITS),
    "temperature": (_private("MP-032", "Token stage temperature"), NO_UNITS),
    "contextual_fraction": (_private("MP-033", "Token stage contextual fraction"), NO_UNITS),
    "slab_mm": (_private("MP-036", "Slab thickness, at most"), MILLIMETRES),
    "gap_cap_mm": (_private("MP-037", "Gap between kept slabs, at most"), MILLIMETRES),
    "tile_change": (_private("MP-038", "Slice stage threshold of a tile"), NO_UNITS),
    "sink_ratio": (_private("MP-039", "Attention sink ratio"), NO_UNITS),
    "salience_floor": (_private("MP-040", "Local contrast above which tokens are kept"), NO_UNITS),
    "coverage_lung": (_private("MP-041", "Share of lung tokens kept, at least"), NO_UNITS),
    "coverage_other": (_private("MP-042", "Share of other regions' tokens kept, at least"), NO_UNITS),
    "merge_similarity": (_private("MP-043", "Similarity of merged tokens, at least"), NO_UNITS),
    "token_budget": (_private("MP-044", "Token budget"), NO_UNITS),
}
PRUNING_SWITCHES: dict[str, Code] = {
    "slice_stage": _private("MP-034", "Slice stage applied"),
    "token_stage": _private("MP-035", "Token stage applied"),
}
PRUNING_CHOICES: dict[str, tuple[Code, dict[str, Code]]] = {
    "method": (
        _private("MP-020", "Pruning method"),
        {
            "medpruner": _private("MP-021", "MedPruner"),
            "guarded": _private("MP-022", "MedPruner with guards"),
            "off": _private("MP-023", "No pruning"),
        },
    ),
    "slab_operation": (
        _private("MP-045", "Slab operation"),
        {"mean": _private("MP-046", "Mean of a slab"), "mip": _private("MP-047", "Maximum of a slab")},
    ),
    "dropped_slices": (
        _private("MP-048", "Dropped slices in the prompt"),
        {
            "omit": _private("MP-049", "Not mentioned in the prompt"),
            "name": _private("MP-050", "Named in the prompt"),
            "refer": _private("MP-051", "Referred to a kept slice in the prompt"),
        },
    ),
}
# A value that has no code yet; Algorithm Parameters names it
OTHER_CHOICE = _private("MP-029", "Named in Algorithm Parameters")

# Segments of the segmentation
SPATIAL_CONCEPT = Code("309825002", "SCT", "Spatial and Relational Concept")
SEGMENTATION = Code("113076", "DCM", "Segmentation")
TOKENS_GIVEN = _private("MP-201", "Region given to the language model")
SLICE_GIVEN = _private("MP-202", "Slice given to the model")

# The quantity of the parametric map
QUANTITY = Code("246205007", "SCT", "Quantity")
SALIENCY = Code("130404", "DCM", "Saliency")

# The closed vocabulary of coded findings, what is said of each, and where it is (CID 240, 244, 6126)
FINDINGS_CODED: dict[FindingName, Code] = {
    FindingName.NODULE: Code("27925004", "SCT", "Nodule"),
    FindingName.EFFUSION: Code("60046008", "SCT", "Pleural effusion"),
    FindingName.CONSOLIDATION: Code("95436008", "SCT", "Lung consolidation"),
    FindingName.PNEUMOTHORAX: Code("36118008", "SCT", "Pneumothorax"),
    FindingName.CARDIOMEGALY: Code("287272002", "SCT", "Cardiomegaly"),
    FindingName.CALCIFICATION: Code("237897009", "SCT", "Vascular Calcification"),
}
_LUNG = Code("39607008", "SCT", "Lung")
_PLEURA = Code("3120008", "SCT", "Pleura")
FINDING_SITES: dict[FindingName, Code] = {
    FindingName.NODULE: _LUNG,
    FindingName.EFFUSION: _PLEURA,
    FindingName.CONSOLIDATION: _LUNG,
    FindingName.PNEUMOTHORAX: _PLEURA,
    FindingName.CARDIOMEGALY: Code("80891009", "SCT", "Heart"),
    FindingName.CALCIFICATION: Code("113262008", "SCT", "Thoracic aorta"),
}
LUNG_ZONES: dict[str, Code] = {
    "upper": Code("281392002", "SCT", "Upper zone of lung"),
    "mid": Code("281393007", "SCT", "Middle zone of lung"),
    "lower": Code("281394001", "SCT", "Lower zone of lung"),
}
SIDES: dict[str, Code] = {
    "right": Code("24028007", "SCT", "Right"),
    "left": Code("7771000", "SCT", "Left"),
    "both": Code("51440002", "SCT", "Bilateral"),
}
PRESENCE = Code("121052", "DCM", "Presence of property")
PRESENT = Code("52101004", "SCT", "Present")
ABSENT = Code("272519000", "SCT", "Absent")
DIAMETER = Code("81827009", "SCT", "Diameter")
PERCENT = Code("%", "UCUM", "Percent")
# How probable the model held its answer
CERTAINTY_OF_FINDING = Code("111012", "DCM", "Certainty of Finding")
CERTAINTY_OF_SIDE = _private("MP-060", "Certainty of side")
CERTAINTY_OF_ZONE = _private("MP-061", "Certainty of zone")
CERTAINTY_OF_DIAMETER = _private("MP-062", "Certainty of diameter")
CERTAINTY_OF_SLICE = _private("MP-063", "Certainty of slice")

CAUTION = _private("MP-100", "Caution")
CAUTIONS: dict[Flag, Code] = {
    Flag.TRUNCATED: _private("MP-101", "Text truncated"),
    Flag.UNPARSED: _private("MP-102", "Text not parsed into sections"),
    Flag.RANDOM_WEIGHTS: _private("MP-103", "Model with random weights"),
    Flag.DEMONSTRATION_WEIGHTS: _private("MP-104", "Demonstration model"),
    Flag.MISSING_SLICES: _private("MP-105", "Slices missing from the series"),
    Flag.UNREADABLE_SLICES: _private("MP-106", "Slices unreadable"),
    Flag.DUPLICATE_POSITIONS: _private("MP-107", "Several slices at one position"),
    Flag.GANTRY_TILT: _private("MP-108", "Gantry tilt not corrected"),
    Flag.REPETITION: _private("MP-109", "Repetitive text cut"),
    Flag.REFUSED: _private("MP-110", "Model declined to report"),
    Flag.NOT_ANALYSED: _private("MP-111", "Not analysed"),
}
# Other results of the same run, as a report refers to them
COMPANIONS: dict[Companion, Code] = {
    Companion.SC: _private("MP-131", "Map of what the model was shown"),
    Companion.SEG: _private("MP-132", "Mask of what the model was shown"),
    Companion.PM: _private("MP-133", "Map of attention received"),
    Companion.PDF: _private("MP-134", "Printed report"),
    Companion.KOS: _private("MP-135", "Selection of the images that the model was shown"),
}
INSTANCES_NOT_LISTED = _private("MP-120", "Instances without readable header")
