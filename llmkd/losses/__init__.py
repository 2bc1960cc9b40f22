"""Pure tensor maths: how far two states or two distributions are apart, the chunked head, weights and schedules."""
