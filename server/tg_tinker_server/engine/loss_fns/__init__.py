"""Losses of datums: functions of one datum's log-probabilities and inputs alone, so that none couples two datums."""
