"""The parts of a review: sources, rules that find suspects, statistics, pictures, the page."""
