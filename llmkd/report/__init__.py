"""From a study's files to statistics, sentences, pictures and one page."""
