"""Measuring a detector: LVIS average precision (`lvis_evaluator`) and the tables made of it (`results`)."""
