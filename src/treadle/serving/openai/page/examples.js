// Prompts for a first look; the texts that change their subject midway are followed by a short window. Weights within a
// prompt come from its text: the model's states are known only after the prompt is read.

const FOLLOW = { window: "24", prefill: "causal", states: "false" };

export const EXAMPLES = [
  {
    title: "Arithmetic, then code",
    routing: FOLLOW,
    prompt: `Question: A farmer has 3 fields with 12 rows of corn each. She sells the corn of 10 rows. How many rows of corn are left?

Answer: There are 3 * 12 = 36 rows. 36 - 10 = 26 rows are left.
#### 26

Question: Write a Python function that returns the largest number in a list.

Answer:`,
  },
  {
    title: "Code, then arithmetic",
    routing: FOLLOW,
    prompt: `Question: Write a Python function that adds two numbers.

Answer:
def add(a, b):
    return a + b

Question: Tom has 12 apples. He gives 5 to Ann and buys 3 more. How many apples has he now?

Answer:`,
  },
  {
    title: "Science",
    prompt: `Question: Which of these makes plants green?

Choices:
A. iron
B. chlorophyll
C. sugar
D. oxygen

Answer:`,
  },
  {
    title: "Reading",
    prompt: `Context: The University of Padua was founded in 1222 by students and professors who had left Bologna. Galileo Galilei held the chair of mathematics there between 1592 and 1610.

Question: Who held the chair of mathematics?

Answer:`,
  },
];
