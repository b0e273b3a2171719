"""What a review is made of: sources, rules that find suspects, statistics, pictures, the page."""
