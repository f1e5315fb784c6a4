"use strict";
for (const section of document.querySelectorAll(".frames")) {
  const triples = [...section.querySelectorAll(".triple")];
  const scrub = section.querySelector(".scrub");
  const range = scrub.querySelector("input");
  const show = () => {
    const at = Number(range.value);
    triples.forEach((triple, i) => { triple.hidden = i !== at; });
    scrub.querySelector("output").textContent = "frame " + triples[at].dataset.index;
  };
  scrub.hidden = triples.length < 2;
  range.addEventListener("input", show);
  show();
}
const data = document.getElementById("data").textContent;
document.getElementById("download").href =
  URL.createObjectURL(new Blob([data], { type: "application/json" }));
