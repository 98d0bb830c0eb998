"""Which token pairs matter?"""
