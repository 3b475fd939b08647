"""The trainer: DeepSpeed engine set-up, the joint gradient norm, schedules, metrics and the step loop."""
