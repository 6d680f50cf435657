"""The CPU runner of the CUDA sources (``simt.h``, ``runner.py``) and the checks of it."""
