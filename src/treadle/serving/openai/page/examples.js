// Prompts for a first look. One is a text that changes its subject midway, followed by a short window. Weights within a
// prompt come from its text: the model's states are known only after the prompt is read.

const FOLLOW = { window: "24", prefill: "causal", states: "false" };

export const EXAMPLES = [
  { title: "Arithmetic", prompt: "Mia has 3 boxes of 12 pencils. How many pencils has she?" },
  {
    title: "Science",
    prompt: `Which of these makes plants green?

Choices:
A. iron
B. chlorophyll
C. sugar
D. oxygen`,
  },
  { title: "Code", prompt: "Write a Python function that returns the largest number in a list." },
  {
    title: "Reading",
    kind: "text",
    prompt: `Context: The University of Padua was founded in 1222 by students and professors who had left Bologna. Galileo Galilei held the chair of mathematics there between 1592 and 1610.

Question: When was the University of Padua founded?

Answer:`,
  },
  {
    title: "Arithmetic, then code",
    kind: "text",
    routing: FOLLOW,
    prompt: `Question: A farmer has 3 fields with 12 rows of corn each. She sells the corn of 10 rows. How many rows of corn are left?

Answer: There are 3 * 12 = 36 rows. 36 - 10 = 26 rows are left.
#### 26

Question: Write a Python function that returns the largest number in a list.

Answer:`,
  },
];
