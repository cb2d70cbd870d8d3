"""Linear attention: a state that decays or is corrected, read by queries; chunk by chunk."""
