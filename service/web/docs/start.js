// A file of its own, because the Content-Security-Policy allows no script inside a page.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null, // asks nobody else about our document
});
