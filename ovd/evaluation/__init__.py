"""Measuring a detector: LVIS and COCO average precision with intervals, recall of proposals, retention, tables.

Flow: `tables` (columns) -> `matching` -> `average_precision` -> `bootstrap` -> `lvis_evaluator`, `coco_evaluator`,
`proposal_recall`, `retention`; `results` makes text and files of it. While a detector runs, `collecting` keeps its
detections as `columns` (masks: `packed_masks`).
"""
