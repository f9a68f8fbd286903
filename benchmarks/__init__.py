"""Speed and memory of headwater's adapters beside the frozen model, PEFT's LoRA and the public formulation."""
