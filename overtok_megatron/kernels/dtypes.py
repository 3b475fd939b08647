"""The torch dtypes that the configuration's names of precisions stand for."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROW_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
