"""The bilingual synthetic world: invented people, sums and stories, every document in English and in Chinese."""
