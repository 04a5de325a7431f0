"""What a TrainingClient can do, by subject: passes and steps, custom losses, texts, checkpoints."""
